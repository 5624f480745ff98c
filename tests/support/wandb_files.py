"""What Weights & Biases wrote for an offline run."""

import struct
import time


def leveldb_records(data):
    """The records in blocks of 32 KiB, of which a long one takes several."""
    place, record = 7, b""  # behind W&B's own header
    while place + 7 <= len(data):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in {1, 4}:  # whole, or the last part
            yield record
            record = b""


def finished_run(file, timeout_s=30):
    """The records of a run: W&B's own process may still be writing when `finish` returns."""
    from wandb.proto.wandb_internal_pb2 import Record

    end = time.monotonic() + timeout_s
    while True:
        records = [Record.FromString(data) for data in leveldb_records(file.read_bytes())]
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < end, f"{file} has no record of the run's end"
        time.sleep(0.1)
