"""From files of examples to a `Source` of tensors: decoding, splitting, tokenising, caching."""
