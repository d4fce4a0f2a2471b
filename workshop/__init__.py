"""How the built-in models and their data were made. Nothing that the package needs to run."""
