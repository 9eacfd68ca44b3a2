"""``python -m launch``: the ``align`` command, where its script is not on the path."""

from launch.cli import main

main()
