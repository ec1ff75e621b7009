"""`python -m jumprelu_plugin.cli`."""

from jumprelu_plugin.cli.app import main

main()
