"""Result tables: schemas, files, statistics, and the store of finished runs."""
