"""LeRobot folders of formats v2.1 and v3.0 written here; test_lerobot_real.py has the real set.

No v3.0 sample was at hand: the one below is written from the format's description (spec data.md
section 6, LeRobot's documentation), several episodes in one parquet and one video.
"""

import json
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av")
pa = pytest.importorskip("pyarrow")

import pyarrow.parquet as pq  # noqa: E402

from st4vla_jax.data.encoder import SampleEncoder  # noqa: E402
from st4vla_jax.data.lerobot import LeRobotSource  # noqa: E402
from st4vla_jax.data.lerobot_folder import LeRobotFolder  # noqa: E402
from st4vla_jax.data.robot_spec import Part, RobotSpec  # noqa: E402
from st4vla_jax.data.source import BadRecordError, Source  # noqa: E402
from st4vla_jax.data.source_files import SourceError  # noqa: E402
from st4vla_jax.data.tokenizer import byte_level_tokenizer  # noqa: E402
from st4vla_jax.data.transforms import encode_robot  # noqa: E402
from st4vla_jax.data.video import VideoReader, frame_table  # noqa: E402

FPS, HEIGHT, WIDTH = 10, 64, 96
LENGTHS = (23, 17, 30)
TASKS = ("stack the cups", "open the drawer")


def spec(**changes):
    settings = {
        "name": "tiny", "embodiment": "arm", "images": {"primary": "cam", "wrist": "hand"},
        "language": "task", "action": (Part("action"),), "state": (Part("state"),),
        "names": ("x", "y", "gripper"), "units": ("m", "m", ""), "control_hz": float(FPS),
        "gripper": (2,), "absolute": (2,),
    }  # fmt: skip
    return RobotSpec(**(settings | changes))


def frame_of(number):
    """A frame that tells its number: eight blocks, black or white, survive any codec."""
    bits = [(number >> i & 1) * 255 for i in range(8)]
    row = np.repeat(np.array(bits, np.uint8), WIDTH // 8)
    return np.broadcast_to(row[None, :, None], (HEIGHT, WIDTH, 3)).copy()


def number_of(frame):
    blocks = frame.mean((0, 2)).reshape(8, -1).mean(1)
    return sum(int(b > 127) << i for i, b in enumerate(blocks))


def write_video(path, numbers, gop=250, frames_between=2, open_gop=False):
    """H.264 with one keyframe (or few) and B-frames: decoding order is not the shown order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.options = {"g": str(gop), "bf": str(frames_between), "sc_threshold": "0",
                          "x264-params": f"open-gop={int(open_gop)}"}  # fmt: skip
        for i, number in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(frame_of(number), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def table_of(episode, first, *, action=None, task=None):
    length = LENGTHS[episode]
    rng = np.random.default_rng(episode)
    action = rng.normal(size=(length, 3)) if action is None else action
    fixed = pa.FixedSizeListArray.from_arrays
    return pa.table({
        "action": fixed(pa.array(action.astype(np.float32).ravel()), 3),
        "state": pa.array(rng.normal(size=(length, 4)).tolist()),
        "timestamp": pa.array((np.arange(length) / FPS).astype(np.float32)),
        "frame_index": pa.array(np.arange(length)),
        "episode_index": pa.array(np.full(length, episode)),
        "index": pa.array(first + np.arange(length)),
        "task_index": pa.array(np.full(length, episode % 2 if task is None else task)),
    })  # fmt: skip


def write_info(root, version, data_path, video_path):
    (root / "meta").mkdir(parents=True)
    vector = {"dtype": "float32", "shape": [3], "names": None}
    video = {"dtype": "video", "shape": [HEIGHT, WIDTH, 3]}
    info = {"codebase_version": version, "fps": FPS, "chunks_size": 1000,
            "features": {"action": vector, "state": vector, "cam": video, "hand": video},
            "data_path": data_path, "video_path": video_path}  # fmt: skip
    (root / "meta/info.json").write_text(json.dumps(info))


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The same three episodes as v2.1 and as v3.0 folders; camera "hand" counts from 100."""
    base = tmp_path_factory.mktemp("lerobot")
    firsts = np.concatenate([[0], np.cumsum(LENGTHS)])
    tables = [table_of(i, int(firsts[i])) for i in range(3)]

    old = base / "v21"
    name = "episode_{episode_index:06d}"
    write_info(
        old,
        "v2.1",
        f"data/chunk-{{episode_chunk:03d}}/{name}.parquet",
        f"videos/chunk-{{episode_chunk:03d}}/{{video_key}}/{name}.mp4",
    )
    lines = [{"task_index": i, "task": text} for i, text in enumerate(TASKS)]
    (old / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lines = [{"episode_index": i, "length": n, "tasks": []} for i, n in enumerate(LENGTHS)]
    (old / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (old / "data/chunk-000").mkdir(parents=True)
    for i, table in enumerate(tables):
        pq.write_table(table, old / f"data/chunk-000/episode_{i:06d}.parquet")
        for key, add in (("cam", 0), ("hand", 100)):
            write_video(old / f"videos/chunk-000/{key}/episode_{i:06d}.mp4",
                        firsts[i] + add + np.arange(LENGTHS[i]))  # fmt: skip

    new = base / "v30"
    write_info(new, "v3.0", "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
               "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4")  # fmt: skip
    pq.write_table(
        pa.table({"task_index": [0, 1], "__index_level_0__": list(TASKS)}),
        new / "meta/tasks.parquet",
    )
    rows = []
    # Parquet: episodes 0 and 1, then 2.  "cam": all in one video; "hand": 0, then 1 and 2.
    for i in range(3):
        row = {
            "episode_index": i, "tasks": [TASKS[i % 2]], "length": LENGTHS[i],
            "data/chunk_index": 0, "data/file_index": int(i == 2),
            "dataset_from_index": int(firsts[i]), "dataset_to_index": int(firsts[i + 1]),
        }  # fmt: skip
        in_hand = (0, 0), (1, 0), (1, LENGTHS[1])  # file, first frame
        for key, file, start in (("cam", 0, firsts[i]), ("hand", *in_hand[i])):
            row |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": file,
                    f"videos/{key}/from_timestamp": float(start) / FPS,
                    f"videos/{key}/to_timestamp": float(start + LENGTHS[i]) / FPS}  # fmt: skip
        rows.append(row)
    for number, part in enumerate((rows[:2], rows[2:])):
        path = new / f"meta/episodes/chunk-000/file-{number:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(part), path)
    (new / "data/chunk-000").mkdir(parents=True)
    pq.write_table(pa.concat_tables(tables[:2]), new / "data/chunk-000/file-000.parquet")
    pq.write_table(tables[2], new / "data/chunk-000/file-001.parquet")
    write_video(new / "videos/cam/chunk-000/file-000.mp4", np.arange(sum(LENGTHS)))
    write_video(new / "videos/hand/chunk-000/file-000.mp4", 100 + np.arange(LENGTHS[0]))
    write_video(new / "videos/hand/chunk-000/file-001.mp4",
                100 + np.arange(firsts[1], firsts[3]), gop=7)  # fmt: skip
    return {"v2.1": old, "v3.0": new}


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_every_frame_of_both_formats(made, version, tmp_path):
    source = LeRobotSource(
        made[version], spec(), chunk=5, views=("primary", "wrist"), index_dir=tmp_path
    )
    assert isinstance(source, Source)
    assert len(source) == sum(LENGTHS)
    row = 0
    for episode, length in enumerate(LENGTHS):
        table = table_of(episode, row)
        actions = np.array(table["action"].to_pylist(), np.float32)
        state = np.array(table["state"].to_pylist(), np.float32)
        for step in range(length):
            sample = source[row]
            assert [number_of(image) for image in sample.images] == [row, 100 + row]
            count = min(5, length - step)
            np.testing.assert_array_equal(
                sample.robot.actions[:count], actions[step : step + count]
            )
            assert sample.robot.action_mask.sum() == 3 * count
            # Past the end: no motion, the gripper as it was.
            np.testing.assert_array_equal(sample.robot.actions[count:, :2], 0)
            np.testing.assert_array_equal(sample.robot.actions[count:, 2], actions[-1, 2])
            np.testing.assert_array_equal(sample.robot.state, state[step])
            assert sample.turns[0].text == TASKS[episode % 2]
            assert sample.record == f"{made[version]}: episode {episode} step {step}"
            row += 1


def test_formats_agree_and_index_is_reused(made, tmp_path):
    old, new = (LeRobotSource(made[v], spec(), chunk=5, index_dir=tmp_path) for v in made)
    for row in (0, 30, 69):
        np.testing.assert_array_equal(old[row].robot.actions, new[row].robot.actions)
    np.testing.assert_array_equal(old.contents(), new.contents())  # no numbers, no file names
    folders = {path.name for path in tmp_path.iterdir() if path.name.startswith("lerobot-")}
    again = LeRobotSource(made["v3.0"], spec(), chunk=8, index_dir=tmp_path)
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith("lerobot-")} == folders
    assert again.fingerprint() != new.fingerprint()
    assert pickle.loads(pickle.dumps(new)).fingerprint() == new.fingerprint()


def test_threads_and_pickle(made, tmp_path):
    source = LeRobotSource(made["v3.0"], spec(), chunk=5, views=("wrist",), index_dir=tmp_path)
    assert len(pickle.dumps(source)) < 1000
    order = np.random.default_rng(0).permutation(len(source))
    with ThreadPoolExecutor(8) as pool:
        copy = pickle.loads(pickle.dumps(source))
        found = list(pool.map(lambda i: number_of(copy[i].images[0]), order.tolist()))
    assert found == (100 + order).tolist()


def test_lengths_are_what_is_encoded(made, tmp_path):
    source = LeRobotSource(
        made["v2.1"], spec(), chunk=5, views=("primary", "wrist"), index_dir=tmp_path
    )
    encoder = SampleEncoder(byte_level_tokenizer(), groups=source.groups)
    lengths = source.lengths(encoder)
    sample = source[30]
    encoded = encode_robot(
        sample.turns[0].text, sample.images, encoder.prompt, encoder.tokenizer,
        image_config=encoder.image_config,
    )  # fmt: skip
    assert lengths.tokens[30] == len(encoded.tokens)
    assert lengths.slots[30] == len(encoded.slots.patches)
    assert len(lengths.tokens) == len(source)


def test_long_and_open_groups_of_pictures(tmp_path):
    path = tmp_path / "long.mp4"
    write_video(path, np.arange(200), gop=250, frames_between=3)
    with av.open(str(path)) as video:
        packets = [p for p in video.demux(video=0) if p.pts is not None]
    assert sum(p.is_keyframe for p in packets) == 1
    assert np.diff([p.pts for p in packets]).min() < 0  # shown in another order than stored
    table = frame_table(path)
    assert table.size == (HEIGHT, WIDTH)
    pts, found = table.nearest(np.arange(200) / FPS, 0.01)
    assert found.all()
    reader = VideoReader()
    for i in (199, 0, 137, 136, 138, 1):
        assert number_of(reader.frame(path, int(pts[i]))) == i
    _, found = table.nearest(np.array([-0.2, 0.05, 19.95, 30.0]), 0.025)
    assert not found.any()


def test_frames_stored_after_a_later_keyframe(tmp_path):
    """Open groups of pictures: a seek finds the keyframe that is shown after these frames."""
    path = tmp_path / "open.mp4"
    write_video(path, np.arange(60), gop=10, frames_between=3, open_gop=True)
    with av.open(str(path)) as video:
        packets = [p for p in video.demux(video=0) if p.pts is not None]
    keys = [i for i, p in enumerate(packets) if p.is_keyframe]
    leading = [p.pts for k in keys for p in packets[k + 1 : k + 4] if p.pts < packets[k].pts]
    pts, _ = frame_table(path).nearest(np.arange(60) / FPS, 0.01)
    assert leading
    reader = VideoReader()
    for i in reversed(range(60)):
        assert number_of(reader.frame(path, int(pts[i]))) == i


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_missing_videos_are_named_before_anything_is_read(made, tmp_path):
    root = copy_of(made["v2.1"], tmp_path)
    gone = [root / f"videos/chunk-000/{k}/episode_00000{i}.mp4"
            for k, i in (("cam", 1), ("hand", 0), ("hand", 1))]  # fmt: skip
    for path in gone:
        path.unlink()
    for path in (root / "data").rglob("*.parquet"):
        path.write_bytes(b"must not be read")
    with pytest.raises(SourceError) as e:
        LeRobotSource(root, spec(), chunk=5, views=("primary", "wrist"), index_dir=tmp_path)
    assert all(str(path) in str(e.value) for path in gone)
    assert "episodes=[2]" in str(e.value)


def test_wrong_names_are_named(made, tmp_path):
    def make(**keys):
        return LeRobotSource(made["v2.1"], chunk=5, index_dir=tmp_path, **keys)

    with pytest.raises(SourceError, match="no views left; there are primary, wrist"):
        make(spec=spec(), views=("left",))
    with pytest.raises(SourceError, match="no video features eye; there are cam, hand"):
        make(spec=spec(images={"primary": "eye"}))
    with pytest.raises(SourceError, match=r"no columns torque, words; there are action"):
        make(spec=spec(action=(Part("torque"),), language="words"))
    with pytest.raises(SourceError, match=r"no episodes \[7\]"):
        make(spec=spec(), episodes=[1, 7])
    with pytest.raises(SourceError, match="is this a LeRobot folder"):
        LeRobotFolder(tmp_path)
    root = copy_of(made["v2.1"], tmp_path)
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | {"codebase_version": "v1.6"}))
    with pytest.raises(SourceError, match=r"LeRobot format v1.6; v2.0, v2.1, v3.0"):
        LeRobotFolder(root)


def test_bad_episodes_are_named_and_may_be_left_out(made, tmp_path):
    root = copy_of(made["v2.1"], tmp_path)
    actions = np.zeros((LENGTHS[0], 3))
    actions[[4, 9], 1] = np.nan
    pq.write_table(table_of(0, 0, action=actions), root / "data/chunk-000/episode_000000.parquet")
    # The second episode's video ends early, the third's camera file is no video.
    write_video(root / "videos/chunk-000/cam/episode_000001.mp4", np.arange(10))
    (root / "videos/chunk-000/cam/episode_000002.mp4").write_bytes(b"no video" * 100)

    def make(**keys):
        return LeRobotSource(root, spec(), chunk=5, index_dir=tmp_path, **keys)

    with pytest.raises(SourceError) as e:
        make()
    assert "3 bad records" in str(e.value)
    assert "episode 0: column action: not finite at steps [4, 9]" in str(e.value)
    assert "episode 1:" in str(e.value)
    assert "has no frame at 7 of its times, first 1.000 s" in str(e.value)
    assert "episode 2:" in str(e.value)
    assert "not a readable video" in str(e.value)
    source = make(max_bad_records=3)
    assert len(source) == 10
    assert source.left_out["no frame"] == 7
    assert len(source.bad) == 3


def test_empty_language_is_left_out_and_counted(made, tmp_path):
    root = copy_of(made["v2.1"], tmp_path)
    (root / "meta/tasks.jsonl").write_text(
        '{"task_index": 0, "task": " "}\n{"task_index": 1, "task": "open the drawer"}'
    )
    source = LeRobotSource(root, spec(), chunk=5, index_dir=tmp_path)
    assert len(source) == LENGTHS[1]
    assert source.left_out["empty language"] == LENGTHS[0] + LENGTHS[2]
    assert number_of(source[0].images[0]) == LENGTHS[0]


def test_video_that_breaks_or_changes_later(made, tmp_path):
    root = copy_of(made["v2.1"], tmp_path)
    source = LeRobotSource(root, spec(), chunk=5, index_dir=tmp_path)
    path = root / "videos/chunk-000/cam/episode_000000.mp4"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3])
    with pytest.raises(BadRecordError, match=r"episode 0 step 20: .*episode_000000.mp4"):
        source[20]
    with pytest.raises(SourceError, match="changed since"):
        pickle.loads(pickle.dumps(source))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        source[20]


def test_lerobot_is_not_imported():
    assert "lerobot" not in sys.modules
