"""`r1pipe serve`: a checkpoint as a server in OpenAI's protocol, for any client."""
