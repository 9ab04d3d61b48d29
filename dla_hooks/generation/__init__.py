"""Attribution of each token that a model generates."""
