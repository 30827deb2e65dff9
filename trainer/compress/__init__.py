"""What compression does to tensors: which weights, which survive, and how only those are learnt."""
