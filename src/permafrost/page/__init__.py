"""The page: one file of HTML that shows a whole experiment, without a network."""
