"""Small general modules: command line, processes, logs, schedules, configuration, checkpoint files."""
