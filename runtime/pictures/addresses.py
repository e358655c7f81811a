"""Which network addresses are this machine's own or its network's."""

import ipaddress

_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_internal(address: str) -> bool:
    """Whether an address is not one of the public internet: loopback, link-local, private, shared, reserved, multicast,
    unspecified; also where IPv6 carries such an IPv4 address (mapped, NAT64, 6to4, Teredo).
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None or ip in _NAT64:
            return is_internal(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        tunnelled = [ip.sixtofour, *(ip.teredo or ())]
        if ip.is_site_local or any(is_internal(str(each)) for each in tunnelled if each is not None):
            return True
    return not ip.is_global or ip.is_multicast or ip.is_reserved
