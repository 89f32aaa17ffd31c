"""The macOS wheel, built and checked on Linux; see README.md."""
