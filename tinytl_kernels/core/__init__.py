"""Facts that operators and backends share: sizes, layouts, kinds of activation. Depends on nothing else here."""
