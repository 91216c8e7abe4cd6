"""Every loss formula of the project, as pure functions of tensors; values per sequence or per token, never a mean."""
