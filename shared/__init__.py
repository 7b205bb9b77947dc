"""The vocabulary that services, trainer and command line share: records, settings, stream, database."""
