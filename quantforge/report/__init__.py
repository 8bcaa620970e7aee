"""What was decided and why, for people: HTML report and model card."""
