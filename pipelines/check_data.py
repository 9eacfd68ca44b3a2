"""Judge the rows of all stages that are to run, before the first of them starts.

    python -m pipelines.check_data RECIPE [key=value ...] --stages STAGE ... [--debug]

Each source is read once, and nothing is printed but what is wrong: a stage reads its data again.
"""

import argparse
import sys
from collections.abc import Sequence

from align.recipe_io import load_recipe
from align.stages import STAGES
from data.load import check_records
from pipelines.process import exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the data; return the exit code: 0 good, 2 bad input, 128 + n signal n."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.check_data", description="Judge the rows of several stages."
    )
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--stages", nargs="+", choices=STAGES, required=True)
    parser.add_argument("--debug", action="store_true", help="show stack traces")
    options = parser.parse_args(arguments)

    def check() -> None:
        check_records(load_recipe(options.recipe, options.overrides), options.stages)

    return exit_code("data", check, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main())
