"""The command line: it parses and prints; everything it does is library code elsewhere."""
