"""From text to windows of tokens: sources → tokenizer → shards → loader. Only the command in prepare.py imports other packages of the project."""
