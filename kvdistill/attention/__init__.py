"""What both stages stand on: where a model's Q, K and V are, and what its attention computes."""
