"""`hybridzoo bench`: speed, memory and cost of networks and operators, as rows of data."""
