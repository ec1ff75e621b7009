"""The `jumprelu` command. Each subcommand reads its options, calls one function and prints."""
