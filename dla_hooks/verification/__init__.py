"""Is a declaration true of a model? Recognising undeclared types, and tracing a break."""
