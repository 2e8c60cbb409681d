"""Stage 3: guided decoding, plain or with exact speculation, over batches that rows may join and leave."""
