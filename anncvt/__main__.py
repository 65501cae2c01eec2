"""``python -m anncvt``."""

from anncvt.cli import main

if __name__ == "__main__":
    main()
