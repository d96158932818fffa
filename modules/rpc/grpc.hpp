// grpc++ as the bodies of cobuild.rpc use it.
#pragma once
#include <map>
#include <string>
#include <vector>

#include <grpcpp/grpcpp.h>
#include <grpcpp/support/byte_buffer.h>

namespace cobuild::rpc {

inline grpc::ByteBuffer to_buffer(const std::string& message) {
    const grpc::Slice slice(message);
    return grpc::ByteBuffer(&slice, 1);
}

inline std::string from_buffer(const grpc::ByteBuffer& buffer) {
    std::vector<grpc::Slice> slices;
    if (!buffer.Dump(&slices).ok()) return {};
    std::string out;
    out.reserve(buffer.Length());
    for (const auto& s : slices) out.append(reinterpret_cast<const char*>(s.begin()), s.size());
    return out;
}

inline std::multimap<std::string, std::string> from_grpc(const std::multimap<grpc::string_ref, grpc::string_ref>& from) {
    std::multimap<std::string, std::string> out;
    for (const auto& [key, value] : from) out.emplace(std::string(key.data(), key.size()), std::string(value.data(), value.size()));
    return out;
}

}  // namespace cobuild::rpc
