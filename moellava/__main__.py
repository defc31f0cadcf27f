# SPDX-License-Identifier: Apache-2.0
"""`python -m moellava`: the command line where its script is not on the path."""

from .cli import main


if __name__ == "__main__":
    main()
