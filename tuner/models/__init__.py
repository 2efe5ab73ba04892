"""Model families. A file names the models it builds in `NAMES` and cuts them into stages in `build`."""
