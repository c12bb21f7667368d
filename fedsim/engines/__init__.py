"""Ways to run one cohort of clients. All give the same result; ``reference`` defines it."""
