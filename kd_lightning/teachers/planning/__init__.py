"""What `plan` builds a teacher from."""
