"""Speed beside Hugging Face PEFT, both measured in one run: `make bench`."""
