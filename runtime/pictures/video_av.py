"""Video files through FFmpeg (PyAV): decodes what the sampled frames need, and makes RGB of those alone."""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.errors import MissingDependencyError, RequestError
from .images import check_area
from .orientation import upright
from .reader import FramesMissing

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# Containers that hold their own data. Playlists and scripts (hls, dash, concat, image2) name other files and hosts.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,ivf,gif,apng,rm,nut,mxf,"
    "h264,hevc,m4v,mjpeg,av1,obu,dv,y4m,yuv4mpegpipe"
)
# H.264 and HEVC show a frame at most this many frames late; one that more have overtaken does not come any more
_MAX_REORDERED = 16
# FFmpeg holds several decoded frames at once, so the bound is below that of pictures
_MAX_FRAME_PIXELS = 8192 * 8192
# above 4K, decoding keeps to few threads
_LARGE_PIXELS, _LARGE_THREADS = 4096 * 2304, 2
# two days at 24 frames a second; about 0.9 GiB of packets, places and times
_MAX_PACKETS = 1 << 22
_RATE_TOLERANCE = 0.01
# Codecs whose bitstream says of each frame whether any other refers to it, so that FFmpeg can leave it out exactly
_SKIPPABLE = ("h264",)


@dataclass(frozen=True, slots=True)
class _Packet:
    """One packet in decoding order. What a file says twice (the times of broken streams) is not trusted."""

    pts: int
    dts: int | None
    is_key: bool
    is_shown: bool


class AvReader:
    """A video file. See VideoReader.

    Raises RequestError for what is no video, and MissingDependencyError without PyAV.
    """

    def __init__(self, source: str | io.BytesIO, threads: int = 0) -> None:
        """threads: FFmpeg's decoding threads; 0 takes as many as the machine has, at most 16."""
        try:
            import av
        except ImportError as error:
            raise MissingDependencyError(
                "video files need PyAV; pip install 'qwen2vl-tc[video]', or give the frames as a list"
            ) from error
        self._av = av
        self._source = source
        self._threads = threads
        # display matrices by the rotation that frames report with them
        self._matrices: dict[int, bytes | None] = {}
        self._container, self._stream = self._open()
        try:
            codec = self._stream.codec_context
            if codec.width and codec.height:
                check_area("video", codec.width, codec.height, _MAX_FRAME_PIXELS)
            # None where packets' times are no guide: frames are then counted by decoding them
            self._packets = self._scan()
            if self._packets is None:
                self._count()
            else:
                self._places = {packet.pts: position for position, packet in enumerate(self._packets)}
                self._shown = sorted(packet.pts for packet in self._packets if packet.is_shown)
                self.frames = len(self._shown)
            self.fps = self._rate()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._container.close()

    def read(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """See VideoReader.read."""
        if self._packets is None:
            yield from self._counted(indices)
            return
        wanted = [self._shown[index] for index in indices]
        frames = self._timed(self._packets, set(wanted))
        held: dict[int, NDArray[np.uint8]] = {}
        for pts in wanted:
            while pts not in held:
                made = next(frames, None)
                if made is None or len(held) > _MAX_REORDERED:
                    self._count()
                    raise FramesMissing
                held[made[0]] = made[1]
            yield held[pts]
            held = {later: pixels for later, pixels in held.items() if later >= pts}

    def _open(self) -> tuple["InputContainer", "VideoStream"]:
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
        if isinstance(self._source, io.BytesIO):
            self._source.seek(0)
        # what stands before a colon FFmpeg takes for a protocol, unless a slash comes first
        source = os.path.abspath(self._source) if isinstance(self._source, str) else self._source
        try:
            container = self._av.container.open(source, "r", options=options, **_metadata(self._av.__version__))
        except (self._av.error.FFmpegError, ValueError) as error:
            raise RequestError(f"not a video that can be read: {getattr(error, 'strerror', None) or error}") from error
        cover = self._av.stream.Disposition.attached_pic
        # without a decoder for it, a stream has no codec context
        streams = [each for each in container.streams.video if not each.disposition & cover and each.codec_context]
        if not streams:
            container.close()
            raise RequestError("has no video stream that can be decoded")
        codec = streams[0].codec_context
        codec.options = {"max_pixels": str(_MAX_FRAME_PIXELS)}
        streams[0].thread_type = "AUTO"
        # every thread holds frames of its own
        codec.thread_count = _LARGE_THREADS if codec.width * codec.height > _LARGE_PIXELS else self._threads
        return container, streams[0]

    def _scan(self) -> list[_Packet] | None:
        """Every packet, read and not decoded; None when one has no time, two have the same, or none is whole."""
        packets: list[_Packet] = []
        for packet in self._demux(self._container, self._stream):
            if packet.pts is None:
                return None
            if len(packets) == _MAX_PACKETS:
                raise RequestError(f"has more than {_MAX_PACKETS} frames; cut it first")
            is_shown = not packet.is_discard and not packet.is_corrupt
            packets.append(_Packet(packet.pts, packet.dts, packet.is_keyframe, is_shown))
        times = {packet.pts for packet in packets}
        return packets if len(times) == len(packets) and any(packet.is_shown for packet in packets) else None

    def _demux(self, container: "InputContainer", stream: "VideoStream") -> Iterator["av.Packet[Any]"]:
        """Packets with data. A file that breaks off, or turns to nonsense, ends there."""
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except self._av.error.FFmpegError:
                return
            if packet is None:
                return
            if packet.size:
                yield packet

    def _rate(self) -> float:
        told = self._stream.average_rate or self._stream.guessed_rate
        if self._packets is not None and self.frames > 1 and self._stream.time_base:
            mean = (self.frames - 1) / float((self._shown[-1] - self._shown[0]) * self._stream.time_base)
            # times in whole milliseconds give it less exactly; a container may name the rate of a camera that varied
            return float(told) if told and abs(told / mean - 1) <= _RATE_TOLERANCE else mean
        if told:
            return float(told)
        if self.frames == 1:
            # it is taken whatever the rate
            return 1.0
        raise RequestError("has no frame rate; give its frames as a list")

    def _timed(self, packets: list[_Packet], wanted: set[int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """The frames of these times, with them, in order but for those where two stretches meet."""
        codec = self._started(self._stream)
        for first, last in _stretches(packets, wanted):
            codec.flush_buffers()
            for position, packet in self._from(packets, first):
                if codec.name in _SKIPPABLE:
                    codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
                yield from self._chosen(self._decode(codec, packet), wanted)
                if position == last:
                    break
            yield from self._chosen(self._decode(codec, None), wanted)

    def _from(self, packets: list[_Packet], first: int) -> Iterator[tuple[int, "av.Packet[Any]"]]:
        """Packets from position `first` on, with their positions."""
        start = packets[first]
        with ExitStack() as opened:
            with suppress(self._av.error.FFmpegError):
                self._container.seek(start.pts if start.dts is None else start.dts, stream=self._stream)
            demuxed = self._demux(self._container, self._stream)
            packet = next(demuxed, None)
            place = None if packet is None or packet.pts is None else self._places.get(packet.pts)
            position = 0 if place is None else place
            if place is None or place > first:
                # without an index, some containers are sought past the place or not at all
                container, stream = self._open()
                opened.enter_context(container)
                demuxed = self._demux(container, stream)
                position = 0
                packet = next(demuxed, None)
            while packet is not None:
                if position >= first:
                    yield position, packet
                packet, position = next(demuxed, None), position + 1

    def _chosen(self, frames: Iterable["VideoFrame"], wanted: set[int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        for frame in frames:
            if frame.pts is not None and frame.pts in wanted and not frame.is_corrupt:
                yield frame.pts, self._rgb(frame)

    def _count(self) -> None:
        """Count the frames by decoding them all: the file's times or its data are damaged."""
        self._packets = None
        self.frames = sum(1 for _ in self._every_frame())
        if not self.frames:
            raise RequestError("none of its frames can be decoded")

    def _counted(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        frames = enumerate(self._every_frame())
        at, pixels = -1, np.empty(0, np.uint8)
        for index in indices:
            while at < index:
                # a damaged file may have fewer the second time: decoding threads differ in what they give up
                at, frame = next(frames, (index, None))
                if frame is None:
                    return
                if at == index:
                    pixels = self._rgb(frame)
            yield pixels

    def _every_frame(self) -> Iterator["VideoFrame"]:
        container, stream = self._open()
        with container:
            codec = self._started(stream)
            for packet in chain(self._demux(container, stream), [None]):
                yield from (frame for frame in self._decode(codec, packet) if not frame.is_corrupt)

    def _started(self, stream: "VideoStream") -> "VideoCodecContext":
        """The decoder, which some versions of PyAV cannot be asked again once it has failed to start."""
        try:
            stream.codec_context.open(strict=False)
        except self._av.error.FFmpegError as error:
            raise RequestError(f"none of its frames can be decoded: {error.strerror}") from error
        return stream.codec_context

    def _decode(self, codec: "VideoCodecContext", packet: "av.Packet[Any] | None") -> Iterator["VideoFrame"]:
        """Frames that are ready after a packet or, for None, the delayed ones. A damaged packet has none."""
        try:
            yield from codec.decode(packet)
        except self._av.error.FFmpegError:
            return

    def _rgb(self, frame: "VideoFrame") -> NDArray[np.uint8]:
        check_area("frame", frame.width, frame.height, _MAX_FRAME_PIXELS)
        pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
        # A frame whose side data was looked at refers to itself, and keeps its picture until garbage is collected. The
        # matrix is the stream's: one look for each rotation that frames have.
        if frame.rotation not in self._matrices:
            matrix: Any = frame.side_data.get("DISPLAYMATRIX")
            self._matrices[frame.rotation] = None if matrix is None else bytes(matrix)
        shown_by = self._matrices[frame.rotation]
        return pixels if shown_by is None else upright(pixels, shown_by)


def _metadata(version: str) -> dict[str, Any]:
    """Makes PyAV open files whose titles are no UTF-8; from 19 on it does so by itself, and knows no such option."""
    return {"metadata_errors": "replace"} if int(version.partition(".")[0]) < 19 else {}


def _stretches(packets: list[_Packet], wanted: set[int]) -> Iterator[tuple[int, int]]:
    """First and last position, in decoding order, of each run of packets that the wanted frames need.

    A frame needs what lies between it and the last key frame shown no later than it is.
    """
    keys = sorted((packet.pts, position) for position, packet in enumerate(packets) if packet.is_key)
    starts = np.array([pts for pts, _ in keys], dtype=np.int64)
    runs: list[tuple[int, int]] = []
    for position, packet in enumerate(packets):
        if packet.pts in wanted:
            before = int(np.searchsorted(starts, packet.pts, side="right")) - 1
            runs.append((min(keys[before][1], position) if before >= 0 else 0, position))
    runs.sort()
    while runs:
        first, last = runs.pop(0)
        while runs and runs[0][0] <= last + 1:
            last = max(last, runs.pop(0)[1])
        yield first, last
