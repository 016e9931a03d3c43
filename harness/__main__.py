"""`python3 -m harness`: the command line from a checkout, nothing installed."""

if __name__ == "__main__":
    from harness.cli import main

    main()
