"""Messages to token ids and back: template, tokenizer, positions."""
