"""One benchmark a module: ``add_arguments(parser)`` and ``run(args)``, which returns figures by name."""
