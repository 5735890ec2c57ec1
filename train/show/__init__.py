"""Pictures of attention: which keys a query of an image sees, and with which weight, in every stage of a network."""
