"""Token shards on object storage: fetched ahead into a cache that the ranks of a node share."""
