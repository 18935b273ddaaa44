"""Text in, windows of tokens out: sources → tokenizer → shards → loader. This package imports no other room."""
