"""Pictures of attention: which keys a query of an image sees, and with which weights, in every stage of a network."""
