"""From token shards to the batches of one rank, in an order that is computed and not stored."""
