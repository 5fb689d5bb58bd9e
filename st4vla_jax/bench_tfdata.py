"""The other side of `bench data`: episodes to batches as peers do it with tf.data.

Run as a file by an interpreter that has tensorflow; it imports nothing of this package, so that its
memory is tf.data's alone.  Stages as in Octo and OpenVLA: records in shuffled order, episodes
interleaved, chunks gathered, steps flattened with their images still encoded, a shuffle buffer,
decode and resize (Lanczos, antialiased) to 224 x 224, batch, prefetch.
"""

import glob
import json
import os
import resource
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

SIDE = 224


def dataset(tf, folder, chunk, batch, buffer):
    """Endless batches of {image u8[B,224,224,3], actions f32[B,C,7], instruction}."""
    spec = {
        "steps/observation/image": tf.io.RaggedFeature(tf.string),
        "steps/language_instruction": tf.io.RaggedFeature(tf.string),
        "steps/action": tf.io.RaggedFeature(tf.float32),
    }

    def steps(record):
        episode = tf.io.parse_single_example(record, spec)
        actions = tf.reshape(episode["steps/action"], [-1, 7])
        count = tf.shape(actions)[0]
        index = tf.range(count)[:, None] + tf.range(chunk)[None]
        return tf.data.Dataset.from_tensor_slices(
            {
                "image": episode["steps/observation/image"],
                "actions": tf.gather(actions, tf.minimum(index, count - 1)),
                "mask": index < count,
                "instruction": episode["steps/language_instruction"],
            }
        )

    def decode(step):
        image = tf.io.decode_jpeg(step["image"], channels=3)
        image = tf.image.resize(image, (SIDE, SIDE), method="lanczos3", antialias=True)
        image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
        return {**step, "image": image}

    files = sorted(glob.glob(os.path.join(folder, "*.tfrecord-*")))
    data = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files), seed=0).repeat()
    data = data.interleave(tf.data.TFRecordDataset, cycle_length=len(files))
    data = data.interleave(steps, cycle_length=8, num_parallel_calls=tf.data.AUTOTUNE)
    data = data.shuffle(buffer, seed=0).map(decode, num_parallel_calls=tf.data.AUTOTUNE)
    return data.batch(batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def main():
    """Arguments: folder chunk batch buffer steps warm-up-steps; prints one line of JSON."""
    folder = sys.argv[1]
    chunk, batch, buffer, steps, warm = (int(text) for text in sys.argv[2:7])
    import tensorflow as tf

    start = time.perf_counter()
    batches = iter(dataset(tf, folder, chunk, batch, buffer))
    next(batches)
    first = time.perf_counter() - start
    for _ in range(warm):
        next(batches)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        next(batches)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    count = steps * batch
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({
        "first_batch_s": first, "samples_s": count / wall, "cpu_ms": 1000 * cpu / count,
        "peak_mib": peak, "version": tf.__version__,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
