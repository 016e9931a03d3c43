"""`python3 -m harness`: the command line from a checkout, nothing installed."""

import sys

if __name__ == "__main__":
    try:
        from harness.cli import main
    except ImportError as error:
        print(f"mla-harness: {error}; install what it needs: pip install -e '.[triton]'", file=sys.stderr)
        raise SystemExit(3) from None
    main()
