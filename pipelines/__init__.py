"""The stages, each a module with ``run(job)`` that reads top to bottom, and their recipes."""
