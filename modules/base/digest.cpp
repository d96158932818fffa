module;
#include <sys/random.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include <openssl/evp.h>

module cobuild.base;

namespace cobuild {

namespace {
constexpr std::string_view prefix = "sha256:";

int hex_value(char c) noexcept {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    return -1;
}

std::string to_hex(std::span<const std::byte> data) {
    static constexpr char digits[] = "0123456789abcdef";
    std::string out;
    out.reserve(data.size() * 2);
    for (const std::byte b : data) {
        out += digits[static_cast<unsigned>(b) >> 4];
        out += digits[static_cast<unsigned>(b) & 15];
    }
    return out;
}
}  // namespace

digest::digest(std::span<const std::byte, size> raw) { std::ranges::copy(raw, raw_.begin()); }

std::optional<digest> digest::try_parse(std::string_view text) noexcept {
    if (!text.starts_with(prefix) || text.size() != prefix.size() + 2 * size) return std::nullopt;
    text.remove_prefix(prefix.size());
    digest out;
    for (std::size_t i = 0; i < size; ++i) {
        const int high = hex_value(text[2 * i]);
        const int low = hex_value(text[2 * i + 1]);
        if (high < 0 || low < 0) return std::nullopt;
        out.raw_[i] = static_cast<std::byte>(high << 4 | low);
    }
    return out;
}

digest digest::parse(std::string_view text) {
    if (const auto parsed = try_parse(text)) return *parsed;
    throw error{errc::invalid, cat("not a digest: ", quoted(text.substr(0, 200)), " (sha256: and 64 hexadecimal digits are expected)")};
}

digest digest::of(std::span<const std::byte> data) {
    std::array<std::byte, size> raw;
    unsigned written = 0;
    if (EVP_Digest(data.data(), data.size(), reinterpret_cast<unsigned char*>(raw.data()), &written, EVP_sha256(), nullptr) != 1)
        throw error{errc::internal, "sha256 is not available in this OpenSSL"};
    return digest{raw};
}

digest digest::of(std::string_view data) { return of(bytes_of(data)); }
std::string digest::str() const { return cat(prefix, hex()); }
std::string digest::hex() const { return to_hex(raw_); }

struct hasher::state {
    struct free_context {
        void operator()(EVP_MD_CTX* c) const noexcept { EVP_MD_CTX_free(c); }
    };
    std::unique_ptr<EVP_MD_CTX, free_context> context{EVP_MD_CTX_new()};
    // Fetched once: an implicit fetch per hash costs more than hashing a small file.
    static const EVP_MD* algorithm() {
        static EVP_MD* const fetched = EVP_MD_fetch(nullptr, "SHA256", nullptr);
        return fetched;
    }
    void begin() {
        if (!context || EVP_DigestInit_ex2(context.get(), algorithm(), nullptr) != 1)
            throw error{errc::internal, "sha256 is not available in this OpenSSL"};
    }
};

hasher::hasher() : state_(std::make_unique<state>()) { state_->begin(); }
hasher::hasher(hasher&&) noexcept = default;
hasher& hasher::operator=(hasher&&) noexcept = default;
hasher::~hasher() = default;

hasher& hasher::update(std::span<const std::byte> data) {
    EVP_DigestUpdate(state_->context.get(), data.data(), data.size());
    return *this;
}

hasher& hasher::update(std::string_view data) { return update(bytes_of(data)); }

digest hasher::finish() {
    std::array<std::byte, digest::size> raw;
    EVP_DigestFinal_ex(state_->context.get(), reinterpret_cast<unsigned char*>(raw.data()), nullptr);
    state_->begin();
    return digest{raw};
}

std::string random_id() {
    std::array<std::byte, 16> raw;
    std::size_t have = 0;
    while (have < raw.size()) {
        const ssize_t n = ::getrandom(raw.data() + have, raw.size() - have, 0);
        if (n < 0 && errno != EINTR) throw_errno("getrandom");
        if (n > 0) have += static_cast<std::size_t>(n);
    }
    return to_hex(raw);
}

namespace {
constexpr std::string_view alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
}

std::string base64_encode(std::span<const std::byte> data) {
    std::string out;
    out.reserve((data.size() + 2) / 3 * 4);
    for (std::size_t i = 0; i < data.size(); i += 3) {
        const std::size_t left = std::min<std::size_t>(3, data.size() - i);
        unsigned bits = 0;
        for (std::size_t j = 0; j < 3; ++j) bits = bits << 8 | (j < left ? static_cast<unsigned>(data[i + j]) : 0U);
        for (std::size_t j = 0; j < 4; ++j) out += j <= left ? alphabet[bits >> (18 - 6 * j) & 63] : '=';
    }
    return out;
}

std::string base64_encode(std::string_view data) { return base64_encode(bytes_of(data)); }

std::optional<std::string> base64_decode(std::string_view text) {
    while (!text.empty() && text.back() == '=') text.remove_suffix(1);
    std::string out;
    unsigned bits = 0;
    unsigned have = 0;
    for (const char c : text) {
        const auto value = alphabet.find(c);
        if (value == std::string_view::npos) return std::nullopt;
        bits = bits << 6 | static_cast<unsigned>(value);
        have += 6;
        if (have >= 8) {
            have -= 8;
            out += static_cast<char>(bits >> have & 0xff);
        }
    }
    return out;
}

}  // namespace cobuild
