"""How the bundled models were made: texts, tokenizer, training, evaluation, model cards."""
