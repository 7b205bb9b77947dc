"""The `headwater` command. Each subcommand has its own module, imported only when it is asked for."""
