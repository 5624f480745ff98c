"""What the tests share: models, streams, references."""
