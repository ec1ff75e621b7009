"""`python -m jumprelu_plugin`: the `jumprelu` command, for launchers that start a module."""

from jumprelu_plugin.cli.app import main

main()
