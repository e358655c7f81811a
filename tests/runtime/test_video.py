"""Videos: frames sampled as the libraries sample them, with the pixels of a full decode, in bounded memory."""

import json
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.clips import every_frame, moving_frame, write_clip
from PIL import Image

from qwen2vl_tc.artifacts.errors import MissingDependencyError, RequestError
from qwen2vl_tc.runtime.pictures import video_av
from qwen2vl_tc.runtime.pictures.frames import FrameRequest, sample_frames
from qwen2vl_tc.runtime.pictures.patches import image_patches
from qwen2vl_tc.runtime.pictures.reader import FramesMissing
from qwen2vl_tc.runtime.pictures.request import VisionOptions
from qwen2vl_tc.runtime.pictures.resize import SizeRequest, frame_size
from qwen2vl_tc.runtime.pictures.video import cut_video
from qwen2vl_tc.runtime.pictures.video_av import AvReader
from qwen2vl_tc.runtime.pictures.vision import ImageSettings

PUBLISHED = ImageSettings(min_pixels=3136, max_pixels=12845056, patch_size=14, temporal_patch_size=2, merge_size=2)
RECORDED = json.loads((Path(__file__).parent / "video_sampling.json").read_text())
SMALL = SizeRequest(min_pixels=3136, max_pixels=20_000)


def patches_of(source, rule="qwen", size=SMALL, settings=PUBLISHED, **wanted):
    cut = cut_video(source, FrameRequest(**wanted), size, settings, VisionOptions(video_sampling=rule))
    return cut.patches, cut.grid


@pytest.mark.parametrize("rule", ["qwen", "transformers"])
def test_frames_are_sampled_as_the_libraries_sample_them(rule):
    compared = 0
    for case in RECORDED["sampling"]:
        if rule not in case:
            continue
        given = (FrameRequest(**case["given"]), rule, case["total"], case["video_fps"], 2)
        if case[rule] is None:
            with pytest.raises(RequestError):
                sample_frames(*given)
        else:
            # torch.arange may end behind the last frame, where the library fails to read it
            assert sample_frames(*given)[0] == [index for index in case[rule] if index < case["total"]], case["given"]
            compared += 1
    assert compared >= 50


def test_frames_are_sized_as_qwen_vl_utils_sizes_them():
    sized = 0
    for case in RECORDED["sizes"]:
        frames, height, width = case["shape"]
        given = (height, width, frames, SizeRequest(**case["given"]), PUBLISHED)
        if case["size"] is None:
            with pytest.raises(RequestError):
                frame_size(*given)
        else:
            # its smart_resize starts from one merge window where transformers' starts from none
            assert frame_size(*given) == tuple(case["size"]), case
            sized += 1
    assert sized >= 100


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"fps": 2.0, "nframes": 4}, "keep one"),
        ({"fps": 0}, "fps"),
        ({"fps": "2"}, "fps"),
        ({"nframes": 2.5}, "nframes"),
        ({"nframes": 100}, "of 50 frames"),
        ({"max_frames": True}, "max_frames"),
        ({"video_start": float("nan")}, "video_start"),
        ({"video_start": 1.0, "video_end": 0.5}, "no frames"),
        *(({name: 10**5000}, f"{name} is out of range") for name in vars(FrameRequest())),
        ({"fps": 10**400}, "fps is out of range"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_a_sampling_that_makes_no_sense_is_refused(wanted, said):
    with pytest.raises(RequestError, match=said):
        sample_frames(FrameRequest(**wanted), "qwen", 50, 25.0, 2)


def test_a_size_that_no_float_holds_is_refused():
    for name in ("total_pixels", "max_pixels", "min_pixels"):
        with pytest.raises(RequestError, match=f"{name} is above"):
            frame_size(480, 640, 10, SizeRequest(**{name: 10**5000}), PUBLISHED)
    with pytest.raises(RequestError, match="resized_height or resized_width is above"):
        frame_size(480, 640, 10, SizeRequest(resized_height=10**5000, resized_width=10**5000), PUBLISHED)


# key frames every 12, open groups, references among B-frames, no B-frames, other codecs and containers
FORMS = {
    "default.mp4": {},
    "short.mp4": {"g": "12", "bf": "3"},
    "open.mp4": {"x264-params": "open-gop=1:keyint=12:bframes=3:b-pyramid=normal:scenecut=0"},
    "open.ts": {"x264-params": "open-gop=1:keyint=12:bframes=3:scenecut=0"},
    "plain.mkv": {"bf": "0", "g": "10"},
    "intra.mp4": {"g": "1"},
    "refresh.mp4": {"x264-params": "intra-refresh=1:keyint=12"},
    "hevc.mp4": {"codec": "libx265", "x265-params": "keyint=12:log-level=none"},
    "mpeg4.avi": {"codec": "mpeg4", "g": "12", "bf": "2"},
    "vp9.webm": {"codec": "libvpx-vp9", "g": "12", "deadline": "realtime", "cpu-used": "8"},
    "raw.h264": {"g": "12"},
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("clips"), {}

    def clip(name: str) -> Path:
        if name not in made:
            made[name] = write_clip(folder / name, **FORMS[name])
        return made[name]

    return clip


def read(reader: AvReader, chosen: list[int]) -> list[np.ndarray]:
    try:
        return list(reader.read(chosen))
    except FramesMissing:
        # pictures that refresh bit by bit have key frames that nothing can start from
        return list(reader.read(chosen))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("threads", [1, 3])
def test_sampled_frames_are_those_of_a_full_decode(clips, name, threads):
    expected = every_frame(clips(name))
    assert len(expected) == 60
    for chosen in ([0, 59], [7, 8, 9], [59], [5, 5, 30], list(range(0, 60, 7)), [13, 47], list(range(60))):
        reader = AvReader(str(clips(name)), threads)
        assert reader.frames == 60
        assert reader.fps == pytest.approx(25 if name == "raw.h264" else 24)  # a bare stream has a default rate
        found = read(reader, chosen)
        reader.close()
        assert len(found) == len(chosen)
        for index, pixels in zip(chosen, found, strict=True):
            np.testing.assert_array_equal(pixels, expected[index], err_msg=f"frame {index} of {chosen}")


def test_only_what_sampled_frames_need_is_decoded_and_only_those_become_rgb(clips, monkeypatch):
    reader = AvReader(str(clips("short.mp4")))
    decoded, converted = [], []
    decode, rgb = AvReader._decode, AvReader._rgb
    monkeypatch.setattr(
        AvReader, "_decode", lambda self, *given: (decoded.append(f) or f for f in decode(self, *given))
    )
    monkeypatch.setattr(AvReader, "_rgb", lambda self, frame: converted.append(frame) or rgb(self, frame))
    assert len(list(reader.read([2, 50]))) == 2
    assert len(converted) == 2
    assert len(decoded) < 12


@pytest.mark.parametrize("rule", ["qwen", "transformers"])
def test_a_video_becomes_the_patches_of_its_sampled_frames(clips, rule):
    path = clips("short.mp4")
    wanted = {"fps": 4.0}
    indices, _ = sample_frames(FrameRequest(**wanted), rule, 60, 24.0, 2)
    patches, (t, h, w) = patches_of(str(path), rule, **wanted)
    assert t == len(indices) // 2
    pixels = patches.reshape(t, h * w, 3, 2, 196)
    frames = every_frame(path)
    for i, index in enumerate(indices):
        # test_vision_pictures compares these with transformers
        expected, grid = image_patches(Image.fromarray(frames[index]), PUBLISHED, SMALL)
        assert grid == (1, h, w)
        np.testing.assert_array_equal(pixels[i // 2, :, :, i % 2], expected.reshape(h * w, 3, 2, 196)[:, :, 0])


@pytest.mark.parametrize(
    ("rule", "wanted", "sampled"),
    [
        ("qwen", {}, "4 of 60"),
        ("qwen", {"nframes": 20}, "20 of 60"),
        # from frame 12 to frame 36
        ("qwen", {"video_start": 0.5, "video_end": 1.5, "nframes": 4}, "4 of 25"),
        ("transformers", {}, "60 of 60"),
        ("transformers", {"fps": 4.0}, "10 of 60"),
    ],
)
def test_a_clip_records_the_rate_that_its_frames_were_sampled_at(clips, rule, wanted, sampled):
    opened = []

    def counted(location):
        opened.append(location)
        return AvReader(location)

    options = VisionOptions(video_sampling=rule, open_video=counted)
    clip = cut_video(clips("short.mp4"), FrameRequest(**wanted), SMALL, PUBLISHED, options)
    taken, of = map(int, sampled.split(" of "))
    # transformers: second_per_grid_ts = temporal_patch_size / (len(frames_indices) / total_num_frames * fps)
    assert clip.seconds == pytest.approx(2 / (taken / of * 24))
    assert clip.kind == "video" and clip.grid[0] == taken // 2
    assert len(opened) == 1


@pytest.mark.parametrize(
    ("wanted", "seconds"),
    [({}, 1.0), ({"fps": 4.0}, 0.5), ({"sample_fps": 1.0}, 2.0), ({"fps": 9, "sample_fps": 8}, 0.25)],
)
def test_a_list_of_frames_has_the_rate_that_the_request_says(wanted, seconds):
    frames = [moving_frame(i, 56, 56) for i in range(3)]
    assert cut_video(frames, FrameRequest(**wanted), SMALL, PUBLISHED, VisionOptions()).seconds == seconds
    with pytest.raises(RequestError, match="fps is 'fast', expected a number"):
        cut_video(frames, FrameRequest(**dict.fromkeys(wanted or ["fps"], "fast")), SMALL, PUBLISHED, VisionOptions())


def test_transformers_rule_takes_every_frame_and_fills_up_an_odd_count(tmp_path):
    path = write_clip(tmp_path / "odd.mp4", frames=7)
    patches, (t, _, _) = patches_of(path, "transformers")
    assert t == 4
    pixels = patches.reshape(t, -1, 3, 2, 196)
    np.testing.assert_array_equal(pixels[3, :, :, 0], pixels[3, :, :, 1])
    for unknown in ({"video_end": 0.1}, {"size": SizeRequest(total_pixels=10**6)}):
        with pytest.raises(RequestError, match="transformers' sampling has no"):
            patches_of(path, "transformers", **unknown)


SHORT = {"one.mp4": {}, "one.mkv": {}, "one.ts": {}, "one.webm": {"codec": "libvpx-vp9"}, "one.h264": {}, "one.avi": {}}


@pytest.mark.parametrize("rule", ["qwen", "transformers"])
@pytest.mark.parametrize("name", SHORT)
def test_a_clip_of_one_frame_is_that_frame_twice(tmp_path, rule, name):
    path = write_clip(tmp_path / name, frames=1, **SHORT[name])
    expected, (_, h, w) = image_patches(Image.fromarray(every_frame(path)[0]), PUBLISHED, SMALL)
    for wanted in ({}, {"fps": 1.0}, {"nframes": 1}, {"nframes": 2}, {"nframes": 64}, {"fps": 30.0, "min_frames": 4}):
        patches, grid = patches_of(path, rule, **wanted)
        assert grid == (1, h, w)
        np.testing.assert_array_equal(patches, expected)


@pytest.mark.parametrize("rule", ["qwen", "transformers"])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_a_clip_shorter_than_a_temporal_patch_ends_with_its_last_frame_over_and_over(tmp_path, rule, frames):
    settings = replace(PUBLISHED, temporal_patch_size=4)
    path = write_clip(tmp_path / "short.mp4", frames=frames)
    shown = every_frame(path)
    for source, wanted in ((path, {"nframes": 4}), (shown, {})):
        patches, (t, h, w) = patches_of(source, rule, settings=settings, **wanted)
        assert t == 1
        pixels = patches.reshape(h * w, 3, 4, 196)
        for i in range(4):
            expected, _ = image_patches(Image.fromarray(shown[min(i, frames - 1)]), PUBLISHED, SMALL)
            np.testing.assert_array_equal(pixels[:, :, i], expected.reshape(h * w, 3, 2, 196)[:, :, 0])


def test_a_time_range_of_a_clip_of_one_frame_holds_it_or_not(tmp_path):
    path = write_clip(tmp_path / "one.mp4", frames=1)
    assert len(patches_of(path, video_start=0.0, video_end=1.0)[0])
    assert len(patches_of(path, video_end=0.0)[0])
    with pytest.raises(RequestError, match="leave no frames"):
        patches_of(path, video_start=1.0)


@pytest.mark.parametrize(
    "name", ["a:b.mp4", "C:clip.mp4", "http:clip.mp4", "data:clip.mp4", "file:clip.mp4", "x,y:z.mp4"]
)
def test_a_video_with_a_colon_in_its_name_is_a_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "plain.mp4", frames=4).rename(name)
    for source in (name, Path(name), Path(name).absolute().as_uri()):
        assert len(patches_of(source)[0])


def test_a_step_that_rounds_past_the_last_frame_leaves_it_out(tmp_path):
    path = write_clip(tmp_path / "short.mp4", frames=17)
    _, (t, _, _) = patches_of(path, "transformers", nframes=14)
    assert t == 7


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_a_list_of_frames_is_taken_whole(count):
    frames = [moving_frame(i, 100, 70) for i in range(count)]
    patches, (t, h, w) = patches_of(frames, fps=1.0)
    assert t == (count + 1) // 2
    pixels = patches.reshape(t, h * w, 3, 2, 196)
    for i in range(2 * t):
        # an odd clip ends with its last frame twice
        expected, _ = image_patches(Image.fromarray(frames[min(i, count - 1)]), PUBLISHED, SMALL)
        np.testing.assert_array_equal(pixels[i // 2, :, :, i % 2], expected.reshape(h * w, 3, 2, 196)[:, :, 0])
    np.testing.assert_array_equal(patches_of(np.stack(frames))[0], patches)


def test_a_list_of_frames_that_is_no_clip_is_refused():
    for frames, said in (
        ([], "no frames"),
        ([moving_frame(0, 50, 50), moving_frame(1, 50, 51)], "frame 1 is 50 x 51"),
        ([moving_frame(0, 50, 50), "absent.png"], r"frame 1: absent\.png"),
        (3, "int: not a video"),
    ):
        with pytest.raises(RequestError, match=said):
            patches_of(frames)
    with pytest.raises(RequestError, match="nframes: a list of frames is taken whole"):
        patches_of([moving_frame(0, 50, 50)] * 4, nframes=2)


@pytest.mark.parametrize("name", ["vfr.mkv", "vfr.mp4"])
def test_a_variable_frame_rate_is_sampled_by_frame_with_its_mean_rate(tmp_path, name):
    times = np.cumsum([1000, 3000, 500, 2500] * 10).tolist()
    path = write_clip(tmp_path / name, times=times)
    reader = AvReader(str(path))
    assert reader.frames == 40
    # times are in 1/24000 s; mkv rounds them to milliseconds, and mp4's own mean counts the last frame's duration
    assert reader.fps == pytest.approx(39 / (times[-1] - times[0]) * 24_000, rel=0.01)
    expected = every_frame(path)
    for index, pixels in zip([3, 20, 39], reader.read([3, 20, 39]), strict=True):
        np.testing.assert_array_equal(pixels, expected[index])


def shown_by(path: Path, a: float, b: float, c: float, d: float, folder: Path) -> Path:
    """The clip with another matrix in its track's header (ISO 14496-12, 8.3.2): a, b, u, c, d, v, x, y, w."""
    identity, matrix = (
        b"".join(round(n * 65536).to_bytes(4, "big", signed=True) for n in (a, b, 0, c, d, 0, 0, 0, 1 << 14))
        for a, b, c, d in ((1, 0, 0, 1), (a, b, c, d))
    )
    data = path.read_bytes()
    at = data.index(identity, data.index(b"tkhd"))
    shown = folder / "shown.mp4"
    shown.write_bytes(data[:at] + matrix + data[at + len(identity) :])
    return shown


# (a, b, c, d): the point (p, q) of the stored frame is shown at (a p + c q, b p + d q); what that makes of its rows
SHOWN = {
    "as stored": ((1, 0, 0, 1), lambda rows: rows),
    "mirrored left to right": ((-1, 0, 0, 1), lambda rows: rows[:, ::-1]),
    "mirrored top to bottom": ((1, 0, 0, -1), lambda rows: rows[::-1]),
    "half a turn": ((-1, 0, 0, -1), lambda rows: rows[::-1, ::-1]),
    "a quarter turn clockwise": ((0, 1, -1, 0), lambda rows: np.rot90(rows, -1)),
    "a quarter turn anticlockwise": ((0, -1, 1, 0), lambda rows: np.rot90(rows, 1)),
    "transposed": ((0, 1, 1, 0), lambda rows: rows.swapaxes(0, 1)),
    "transposed about the other diagonal": ((0, -1, -1, 0), lambda rows: rows[::-1, ::-1].swapaxes(0, 1)),
    "scaled and a little off": ((-2, 0.01, 0, 1), lambda rows: rows[:, ::-1]),
}


@pytest.mark.parametrize(("matrix", "upright"), SHOWN.values(), ids=SHOWN.keys())
def test_a_video_is_shown_as_its_display_matrix_says(tmp_path, matrix, upright):
    plain = write_clip(tmp_path / "plain.mp4", frames=4)
    shown = shown_by(plain, *matrix, tmp_path)
    stored = every_frame(plain)[0]
    np.testing.assert_array_equal(next(AvReader(str(shown)).read([0])), upright(stored))


@pytest.mark.parametrize("matrix", [(0.7, 0.7, -0.7, 0.7), (0, 0, 0, 0), (1, 1, 0, 1), (1, 0, 0, 0)])
def test_a_matrix_that_is_no_quarter_turn_is_refused(tmp_path, matrix):
    shown = shown_by(write_clip(tmp_path / "plain.mp4", frames=4), *matrix, tmp_path)
    with pytest.raises(RequestError, match=r"shown\.mp4: is shown by the matrix"):
        patches_of(shown)


def test_a_title_that_is_no_utf_8_does_not_keep_a_video_from_being_read(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(write_clip(tmp_path / "plain.mkv", frames=4))) as source, av.open(str(path), "w") as made:
        made.metadata["title"] = "a title"
        stream = made.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                made.mux(packet)
    path.write_bytes(path.read_bytes().replace(b"a title", b"\xff\xfe\x80itle"))
    assert len(patches_of(path)[0])


def test_a_file_that_ends_early_is_sampled_over_the_frames_it_has(tmp_path):
    whole = write_clip(tmp_path / "whole.mkv", g="12")
    (tmp_path / "cut.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    reader = AvReader(str(tmp_path / "cut.mkv"))
    assert 10 < reader.frames < 50
    found = list(reader.read(list(range(0, reader.frames - 1, 3))))
    for i, pixels in enumerate(found):
        np.testing.assert_array_equal(pixels, every_frame(whole)[3 * i])
    patches, _ = patches_of(str(tmp_path / "cut.mkv"))
    assert len(patches)


def test_where_packets_lie_frames_are_counted_by_decoding(clips, tmp_path):
    data = bytearray(clips("short.mp4").read_bytes())
    start = data.index(b"mdat") + len(data[data.index(b"mdat") :]) // 2
    data[start : start + 1500] = bytes(1500)
    path = tmp_path / "hole.mp4"
    path.write_bytes(data)
    counted = len(every_frame(path, skip_damaged=True))
    assert 20 < counted < 60
    _, (t, _, _) = patches_of(str(path), fps=24.0)
    assert t == counted // 2


def without_first_picture(source: Path, path: Path) -> Path:
    with av.open(str(source)) as container:
        first = next(container.demux(video=0))
        start, size = first.pos, first.size
    data = bytearray(source.read_bytes())
    data[start + 4 : start + size] = bytes(size - 4)
    path.write_bytes(data)
    return path


def test_a_frame_that_never_comes_is_not_waited_for_with_all_the_others_in_memory(clips, tmp_path, monkeypatch):
    path = without_first_picture(clips("intra.mp4"), tmp_path / "damaged.mp4")
    made = []
    rgb = AvReader._rgb
    monkeypatch.setattr(AvReader, "_rgb", lambda self, frame: made.append(frame.pts) or rgb(self, frame))
    reader = AvReader(str(path))
    assert reader.frames == 60
    with pytest.raises(FramesMissing):
        list(reader.read(list(range(60))))
    assert len(made) <= 20
    assert reader.frames == 59
    assert len(patches_of(path, nframes=58)[0])


def test_a_file_whose_frames_differ_at_every_reading_is_refused_by_name(clips):
    class Fickle(AvReader):
        def read(self, indices):
            raise FramesMissing

    with pytest.raises(RequestError, match=r"short\.mp4: frames that were counted do not come"):
        cut_video(clips("short.mp4"), FrameRequest(), SMALL, PUBLISHED, VisionOptions(open_video=Fickle))


def test_a_file_of_endless_tiny_packets_is_refused(clips, monkeypatch):
    monkeypatch.setattr(video_av, "_MAX_PACKETS", 59)
    with pytest.raises(RequestError, match="more than 59 frames"):
        patches_of(clips("short.mp4"))


def test_frames_above_the_limit_are_refused_by_the_decoder_too(clips, monkeypatch):
    # a stream may change its size after the header that was checked
    monkeypatch.setattr(video_av, "_MAX_FRAME_PIXELS", 160 * 96 - 1)
    with pytest.raises(RequestError, match="160 x 96 pixels, at most 15359"):
        patches_of(clips("short.mp4"))
    monkeypatch.setattr(video_av, "check_area", lambda *given: None)
    with pytest.raises(RequestError, match="none of its frames can be decoded"):
        patches_of(clips("short.mp4"))


def test_counting_frames_does_not_hold_the_file(clips, monkeypatch):
    demux, ahead = AvReader._demux, []
    monkeypatch.setattr(
        AvReader, "_demux", lambda self, *given: (ahead.append(packet) or packet for packet in demux(self, *given))
    )
    reader = AvReader(str(clips("intra.mp4")), threads=1)
    ahead.clear()
    next(iter(reader._every_frame()))
    assert len(ahead) < 10


def no_video(folder: Path) -> Path:
    path = folder / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def playlist(folder: Path) -> Path:
    path = folder / "list.m3u8"
    path.write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n")
    return path


def script(folder: Path) -> Path:
    path = folder / "list.ffconcat"
    path.write_text("ffconcat version 1.0\nfile /etc/hostname\n")
    return path


def text_file(folder: Path) -> Path:
    path = folder / "notes.mp4"
    path.write_text("not a video")
    return path


def empty_file(folder: Path) -> Path:
    path = folder / "empty.mp4"
    path.write_bytes(b"")
    return path


@pytest.mark.parametrize("make", [no_video, playlist, script, text_file, empty_file], ids=lambda f: f.__name__)
def test_what_is_no_video_is_refused_by_name_and_the_next_one_works(clips, tmp_path, make):
    path = make(tmp_path)
    with pytest.raises(RequestError, match=f"{path.name}: (not a video|has no video)"):
        patches_of(path)
    assert len(patches_of(clips("short.mp4").read_bytes())[0])


@pytest.mark.parametrize(
    "source",
    ["http://example.com/a.mp4", "absent.mp4", "data:video/mp4;base64,??", "data:video/mp4;base64,é", "file://[x", ""],
)
def test_what_is_no_local_video_is_refused(source):
    with pytest.raises(RequestError):
        patches_of(source)


def test_a_video_too_large_for_memory_is_refused_before_it_is_decoded(tmp_path):
    path = write_clip(tmp_path / "long.mp4", frames=200, width=64, height=64)
    with pytest.raises(RequestError, match=r"long\.mp4: 200 frames .* GiB"):
        patches_of(path, "transformers", SizeRequest(min_pixels=12_000_000, max_pixels=12_800_000))


def test_without_pyav_the_way_out_is_named(monkeypatch, clips):
    path = clips("short.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependencyError, match=r"qwen2vl-tc\[video\]"):
        patches_of(path)


MEMORY = """
import sys
from qwen2vl_tc.runtime.pictures.frames import FrameRequest
from qwen2vl_tc.runtime.pictures.request import VisionOptions
from qwen2vl_tc.runtime.pictures.resize import SizeRequest
from qwen2vl_tc.runtime.pictures.video import cut_video
from qwen2vl_tc.runtime.pictures.vision import ImageSettings
settings = ImageSettings(3136, 12845056, 14, 2, 2)
cut = cut_video(sys.argv[1], FrameRequest(), SizeRequest(), settings, VisionOptions())
assert "torch" not in sys.modules and "transformers" not in sys.modules
# not ru_maxrss: a child starts with its parent's
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(cut.grid[0], cut.patches.nbytes, int(peak) * 1024)
"""


def repeated(source: Path, path: Path, times: int, seconds: int) -> Path:
    with av.open(str(path), "w") as made:
        stream = None
        for i in range(times):
            with av.open(str(source)) as container:
                stream = stream or made.add_stream_from_template(container.streams.video[0])
                for packet in container.demux(video=0):
                    if packet.size:
                        later = round(i * seconds / packet.time_base)
                        packet.pts, packet.dts, packet.stream = packet.pts + later, packet.dts + later, stream
                        made.mux(packet)
    return path


@pytest.mark.slow
def test_ten_minutes_of_1080p_stay_under_one_gigabyte(tmp_path):
    # 30 frames over and over, 2 s each; from 300 on, frames share a budget of pixels that no longer grows
    short = write_clip(tmp_path / "short.mp4", 30, 1920, 1080, rate=Fraction(1, 2), period=6, preset="ultrafast")
    path = repeated(short, tmp_path / "long.mp4", 10, seconds=60)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True)
    steps, held, peak = map(int, done.stdout.split())
    assert steps == 150
    assert held > 450e6
    assert peak < 1e9
