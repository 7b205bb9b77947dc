"""What the paper measures, on checkpoints. Called by benchmarks and the command line, never by a service."""
