"""How the bundled models were made: words, texts, tokenizer, training, evaluation."""
