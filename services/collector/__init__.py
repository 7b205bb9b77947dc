"""The collector: reads documents, calls the three services, writes scored documents to the stream."""
