"""The ``align`` command and the processes that it starts."""
